"""Project, account, bucket name and quotas: from gcloud's own files, or by asking gcloud."""
