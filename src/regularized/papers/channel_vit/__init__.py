"""Channel Vision Transformers: An Image Is Worth C x 16 x 16 Words: card."""
