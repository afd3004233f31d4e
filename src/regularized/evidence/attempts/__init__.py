"""More than one attempt: evidence of another machine or person beside the runs that ship.

An attempt is a ledger with one more key, ``attempt``, which says who made it, where, when and how. It comes as a file
``attempt.json``, alone, in a folder or in a zip, and is kept as ``papers/<slug>/attempts/NAME.json``::

    bundle.write(attempt, folder)              a paper's evidence as a folder that anybody can check
    files.read(path)                           the text of an attempt, out of a hostile file
    form.parse(text)                           is it an attempt at all? Every string, number and key of it
    fitting.misfits(attempt, ...)              is it of this paper, code, settings, seeds, data?
    kept.load(folder), kept.keep(attempt, folder)   those beside a ledger
    judging.together(claims, shipped, attempts)     the claims with what each attempt says

What is checked says that a file fits, not that anybody made the runs: that is seen by making one of them again.
"""
