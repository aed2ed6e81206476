"""The parts of `train.evaluate`: test sets, methods, metrics, records, report."""
