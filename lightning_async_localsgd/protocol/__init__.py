"""The protocol: what workers and their exchange decide. Pure: no clock, no thread, no network, no model."""
