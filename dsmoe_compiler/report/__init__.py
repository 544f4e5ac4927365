"""What the compiler found, did and declined: facts, their JSON, their text."""
