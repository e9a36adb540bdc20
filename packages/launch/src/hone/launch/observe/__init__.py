"""What a run leaves behind and what the person at the keyboard sees; no torch, ray or vllm in here.

Flow: the loop yields metrics -> RunDirectory.append_metrics and Display.step; the ledger and faults -> events.jsonl;
at the end a Summary -> Display.done and report.md, which is made from the run directory's files alone.
"""
