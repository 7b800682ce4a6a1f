"""Images and text: conversations with images, and the datasets that are made of them."""
