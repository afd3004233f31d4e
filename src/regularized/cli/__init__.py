"""The command line: ``regularized papers | show | reproduce | conform | bench | ...``."""
