"""Read captioned images, and collate them into batches."""
