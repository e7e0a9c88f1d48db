"""The TFDS dataset `digit_prices`: price tags of handwritten digits, each with its price."""
