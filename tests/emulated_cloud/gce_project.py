"""The calls that SkyPilot makes of Google's other APIs: cloudresourcemanager, iam, serviceusage. All permissions are granted
unless a test denies them."""

from __future__ import annotations

from typing import Any

from tests.emulated_cloud.gce_http import ApiError, Call, Handler, Json, route

SERVICES = ("compute", "cloudresourcemanager", "iam", "tpu", "storage", "serviceusage")


class Project:
    """denied: permissions that the login lacks."""

    def __init__(self, project: str) -> None:
        self.project = project
        self.denied: set[str] = set()
        self.accounts: dict[str, Json] = {}
        self.policy: Json = {"version": 1, "etag": "BwX", "bindings": []}

    def routes(self) -> list[tuple[tuple[str, Any], Handler]]:
        root = "/v1/projects/{project}"
        return [
            (route("GET", root), self.get),
            (route("POST", f"{root}:testIamPermissions"), self.test_permissions),
            (route("POST", f"{root}:getIamPolicy"), lambda call, project: self.policy),
            (route("POST", f"{root}:setIamPolicy"), self.set_policy),
            (route("GET", f"{root}/serviceAccounts/{{email}}"), self.get_account),
            (route("POST", f"{root}/serviceAccounts"), self.make_account),
            (route("GET", f"{root}/services"), self.list_services),
            (route("HEAD", "/network"), lambda call: {}),
            (route("GET", "/network"), lambda call: {}),
        ]

    def get(self, call: Call, project: str) -> Json:
        if project != self.project:
            raise ApiError(403, "forbidden", "The caller does not have permission")
        return {"projectId": project, "projectNumber": "123456789", "lifecycleState": "ACTIVE", "name": project}

    def test_permissions(self, call: Call, project: str) -> Json:
        return {"permissions": [one for one in call.body["permissions"] if one not in self.denied]}

    def set_policy(self, call: Call, project: str) -> Json:
        self.policy = call.body["policy"]
        return self.policy

    def get_account(self, call: Call, project: str, email: str) -> Json:
        if email not in self.accounts:
            raise ApiError(404, "notFound", f"Unknown service account {email}")
        return self.accounts[email]

    def make_account(self, call: Call, project: str) -> Json:
        email = f"{call.body['accountId']}@{project}.iam.gserviceaccount.com"
        self.accounts[email] = {
            "name": f"projects/{project}/serviceAccounts/{email}",
            "email": email,
            "projectId": project,
        }
        return self.accounts[email]

    def list_services(self, call: Call, project: str) -> Json:
        return {"services": [{"config": {"name": f"{name}.googleapis.com"}, "state": "ENABLED"} for name in SERVICES]}
