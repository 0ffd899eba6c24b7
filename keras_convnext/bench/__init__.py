"""Speed, measured against named peers in the same run: `keras-convnext bench`.

contestants (who runs, and one step of it) <- worker (a process of one contestant) <- turns (who works when)
<- compare (the tables of a run) <- report (text, CSV, Markdown, plot)
"""
