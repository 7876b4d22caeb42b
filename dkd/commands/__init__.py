"""The commands of `dkd`: one file each."""
