"""`medusa-chat bench`: what the heads bring on this machine. Ratios within one run, medians, equal baselines."""
