"""What the examples, the benchmarks and the command line train: a small GPT, and text for it to learn."""
