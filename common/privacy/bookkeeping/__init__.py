"""Each image's gradient from book-keeping: a layer's input and output gradient, nothing twice."""
