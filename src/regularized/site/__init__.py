"""The catalogue in a browser: lists, search, evidence, feeds, an API, votes, discussion, and the e-mail digest.

``regularized site`` serves it. The modules, from the ground up: ``settings`` (from the environment), ``models`` and
``database`` (tables, migrations), ``sync`` (cards and ledgers into tables), ``queries``, ``search``, then what is
served: ``pages``, ``feeds``, ``api``, ``people``; ``app`` puts them together.

The packages that it needs are the extra ``site``: ``pip install "regularized[site]"``.
"""
