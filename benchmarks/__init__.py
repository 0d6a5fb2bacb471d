"""Speed and memory claims, runnable: ratios from one run on one machine."""
