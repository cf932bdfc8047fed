"""What the loop asks of the machine it runs on: memory that stays, and threads that are not waited for."""
