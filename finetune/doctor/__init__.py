"""Is this machine, account, quota and bucket ready?"""
