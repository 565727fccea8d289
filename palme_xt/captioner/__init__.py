"""Train a captioner on a folder of captioned images, and caption images with it."""
