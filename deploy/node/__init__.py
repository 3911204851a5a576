"""A hospital's node: Flower's SuperNode, and beside it the process that runs the app.

``consilium hospital start DIR`` (:mod:`~deploy.node.launch`) keeps two processes alive:

* :mod:`~deploy.node.supernode` holds the node's key and talks to the server; it runs no app;
* :mod:`~deploy.node.apps` reads the pictures and trains; it talks to the SuperNode only, and runs
  the code that the hospital has installed, never what a server sends (:mod:`~deploy.node.code`).

All connections go out. What a node keeps besides the hospital's own files is in ``DIR/node``
(:class:`~deploy.node.state.NodeState`) and ``DIR/logs``.
"""
