"""The model and data of the examples, the benchmarks and the command line: a small GPT and text."""
