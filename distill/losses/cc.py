"""CC: correlation congruence (Peng et al., ICCV 2019), as RepDistiller has it from the authors."""

from __future__ import annotations

from torch import Tensor, nn

from distill.losses.inputs import check_embeddings, check_pair, embedding_of, teacher_of
from distill.precision import full_precision, no_autocast
from distill.protocols import Criterion, DataFacts, ModelFacts, ModelOutput, Needs, Target


def cc_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The sum over d of |s - t|_id |s - t|_(i+1)d, of every two neighbours of the batch: [B, D] x 2 -> [B - 1].

    Source: RepDistiller b84f547, `Correlation`, whose scalar is our mean. The paper compares two matrices of correlations
    instead; this is what the published numbers were made with. An image counts in two products but for the first and the last.
    Computed in float32 (float64 stays). Raises ValueError for shapes that differ and for fewer than two images.
    """
    check_pair(student, teacher, "cc", dimensions=2)
    check_neighbours(len(student))
    with no_autocast(student):
        apart = (full_precision(student) - full_precision(teacher)).abs()
        return (apart[:-1] * apart[1:]).sum(1)


def check_neighbours(images: int) -> None:
    """Raises ValueError for a batch in which no image has a neighbour."""
    if images < 2:
        raise ValueError(f"cc compares each image with the next one of its batch and got {images}; give two or more")


class CC(Criterion):
    """Correlation congruence (CC; Peng et al., ICCV 2019): the mean of `cc_loss` of embeddings behind linear layers.

    Both linear layers are trained, the teacher's too, as released. The papers' weight is 0.02. The loss reads neighbours in the
    micro-batch of one process, so accumulation and processes change which images meet.

    Args:
        student: facts of the student: what its last linear layer reads.
        teacher: facts of the teacher: the same.
        data: facts of the data: the micro-batch, at least 2.
        embedding: numbers of an image behind the linear layers.
    """

    student_needs = teacher_needs = Needs(embedding=True)

    def __init__(self, student: ModelFacts, teacher: ModelFacts, data: DataFacts, *, embedding: int = 128) -> None:
        super().__init__()
        check_embeddings("cc", student=student, teacher=teacher)
        check_neighbours(data.micro_batch)
        if embedding < 1:
            raise ValueError(f"embedding {embedding} must be at least 1 number")
        self.student = nn.Linear(student.embedding, embedding)
        self.teacher = nn.Linear(teacher.embedding, embedding)

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over neighbours."""
        theirs = self.teacher(embedding_of(teacher_of(teacher, "cc")).detach())
        return cc_loss(self.student(embedding_of(student)), theirs).mean(), {}
