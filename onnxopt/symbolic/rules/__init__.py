"""What each operator makes of the dims and small integers of its inputs."""
