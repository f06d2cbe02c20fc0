"""The protocol: the decisions of workers and their exchange. Pure: no clock, no thread, no network, no model."""
