"""A hospital's side: the ClientApp, what it does when asked, what it keeps."""
