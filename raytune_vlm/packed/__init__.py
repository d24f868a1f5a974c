"""Packed execution: many trials' adapters on one frozen base, each as if it were alone."""
