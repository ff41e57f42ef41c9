"""What is examined, and what the checks have learned so far."""

from dataclasses import dataclass, field
from typing import Any

from pipelines.compiled import Package
from pipelines.doctor.asks import Asks
from pipelines.doctor.cluster import Cluster

KFP_SECRET = "mlpipeline-minio-artifact"  # what KFP's launcher reads when nothing else is configured
CONTROLLER = "kubeflow"  # where KFP's own pods run, unless somebody says otherwise


@dataclass(frozen=True)
class Place:
    """A place in a store that the run will use, and where its keys are."""

    name: str
    uri: str
    endpoint: str  # "" = Amazon
    secret: str
    access: str = "accesskey"
    key: str = "secretkey"
    region: str = ""


@dataclass
class Case:
    """The questions, from the command line, and the answers that later checks build on."""

    package: Package
    options: dict[str, Any]  # where KFP is and who asks, see pipelines/options.py
    parameters: dict[str, Any]  # of the package: what was given, else its defaults
    store: str = ""
    secret: str = ""
    queue: str = ""
    pull_secret: str = ""
    account: str = ""  # the service account, "" = KFP's own; filled once it was found
    pod: bool = True
    pod_seconds: float = 120.0
    no_pod: str = "--no-pod was given"

    namespace: str = ""
    cluster: Cluster | None = None
    multi_user: bool | None = None  # None: KFP did not answer
    has_namespace: bool = False
    asks: Asks | None = None
    places: list[Place] = field(default_factory=list)
    keys: dict[str, dict[str, str]] = field(default_factory=dict)  # secret -> its decoded values
    authority: str = ""  # the secret with the store's private authority, once it was found
    absent: set[str] = field(default_factory=set)  # secrets known to be missing or unusable
    tokens: set[str] = field(default_factory=set)

    def known(self) -> set[str]:
        """Every value that must not be shown."""
        values = {v for secret in self.keys.values() for v in secret.values()}
        return {v.strip() for v in values | self.tokens if v.strip()}

    def parameter(self, name: str) -> str:
        """A text parameter of the package; "" where this package has none of that name."""
        value = self.parameters.get(name)
        return value if isinstance(value, str) else ""

    @property
    def accounts(self) -> list[str]:
        """The service account that KFP gives to a run's pods; both candidates while KFP does not tell its kind."""
        if self.account:
            return [self.account]
        if self.multi_user is None:
            return ["pipeline-runner", "default-editor"]
        return ["default-editor" if self.multi_user else "pipeline-runner"]

    @property
    def system(self) -> str:
        """The namespace of KFP's own pods: the users' one, unless there are many users."""
        return CONTROLLER if self.multi_user else self.namespace

    def path(self, kind: str, name: str = "") -> str:
        """The path of something in the namespace, for example `secrets`, `pods`."""
        return f"/api/v1/namespaces/{self.namespace}/{kind}" + (f"/{name}" if name else "")
