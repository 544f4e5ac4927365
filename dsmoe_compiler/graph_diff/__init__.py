"""Two graphs compared, whatever they are kept in: what is known of each as plain data, and what differs."""
