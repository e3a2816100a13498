"""What a bundle lost against a reference: recordings, logit metrics, task metrics and their statistics, without torch.

    from vl2.accuracy.compare import compare
    report = compare(Path("fp16.recording"), Path("int4.bundle"), Path("questions.jsonl"))
"""
