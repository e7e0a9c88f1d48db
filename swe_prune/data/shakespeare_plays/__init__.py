"""The TFDS dataset `shakespeare_plays`: all of Shakespeare's plays, split by play."""
