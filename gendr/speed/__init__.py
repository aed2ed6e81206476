"""Optional ways of running a pass: CUDA graphs, torch.compile, transfers beside the computing."""
