"""What is asked of the server and what it answers, as plain data: no I/O."""
