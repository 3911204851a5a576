"""The coordinator's side of a real deployment: ``consilium federation serve``, and its clients.

One command keeps four things alive (:mod:`~deploy.server.serve`): Flower's SuperLink on a Unix
socket (:mod:`~deploy.server.superlink`), the gate, which is all that hospitals reach
(:mod:`~deploy.server.gate`), the executor of ServerApps (:mod:`~deploy.server.executor`), and a
thread that registers hospitals' nodes as they are admitted and revoked
(:mod:`~deploy.server.registrar`). ``consilium run`` (:mod:`~deploy.server.run`) starts a run on it.

What belongs to the server lies in the coordinator's folder; see :mod:`deploy.server.layout`.
"""
