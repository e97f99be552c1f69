"""Reconciles WeightVersions and WeightRollouts: observe, decide, perform."""
