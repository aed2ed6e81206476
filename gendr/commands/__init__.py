"""The work behind the command line: what `gendr.cli` hands over once the words are understood."""
