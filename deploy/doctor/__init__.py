"""``consilium hospital check``: what stands between this hospital and a round, and what to do.

For the hospital's IT person. Each check is a function of its own, which returns a
:class:`~deploy.doctor.result.Result`; :mod:`deploy.doctor.checkup` has them in their order, with
what each needs. Nothing is written in the hospital's folder, nothing is made, and nothing that is
secret is said.
"""
