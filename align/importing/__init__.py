"""`align import`: a file of another trainer, or a script that calls it, becomes a recipe that says what it kept.

Nothing of that trainer is imported and no script is run. Each tool is one module that says what its file calls our
keys; `plan` writes down what becomes of every key, `losses` what its loss is here, `templates` how it joins messages.
"""
