"""The training tool: a captioner from a folder of captioned images."""
