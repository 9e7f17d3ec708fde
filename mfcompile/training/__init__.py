"""What keeps masks in force in the training code of others: checks, files, adapters, transfer, a callback."""
