"""Random Teachers are Good Teachers: card."""
