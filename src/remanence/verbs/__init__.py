"""The verbs of the command line: what each is given, what it says. Work is done elsewhere."""
