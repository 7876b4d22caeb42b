"""`dkd launch`: start a command on several processes of this machine."""
