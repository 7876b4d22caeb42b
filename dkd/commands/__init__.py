"""The commands of `dkd`, one module or package for each."""
