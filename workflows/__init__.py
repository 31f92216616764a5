"""Scheduled batch retraining: plain commands that any scheduler may call, each of which may be killed and called again.

    python -m workflows.retrain pipeline.toml      train on what is new, judge, publish or reject
    python -m workflows.registry list FOLDER       what was published, and which model is live
    python -m workflows.schedule pipeline.toml     call the first by a cron expression

The words:

    slot        an hour, a day, ...: the partitions of one folder, as in date=2024-09-21/hour=14
    pipeline    which slots, which run, which gate, which registry: one TOML file
    attempt     one way of a slot through the steps; a slot that is trained anew, or has got more files, has several
    step        check, preview, train, evaluate, judge, publish or reject, prune
    ledger      SQLite: slots, their files, attempts, steps and what came of each; and who is at work (a lease)
    gate        what a new model must reach beside the live one
    registry    published models, each complete, and `current`, which names the live one

Floors, top to bottom:

    commands    retrain  registry  schedule
    loop        one attempt, step by step
    check  gate  report  notify
    ledger  store  slots  pipeline
"""
