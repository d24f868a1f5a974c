"""An experiment's samples as the files that other trainers read."""
