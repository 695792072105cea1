def write_report(output, docs):
    pass
