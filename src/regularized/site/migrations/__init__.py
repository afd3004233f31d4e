"""Migrations of the site's database, run at every start by :func:`regularized.site.database.migrate`."""
