/** Whose times these are. */
export type Peer = 'torch-eager' | 'torch-compiled'

/** What a stage moves and computes before the next one can begin. */
export interface Phase {
  readonly bytes: number
  readonly operations: number
  /** As much is written as is read. */
  readonly copy: boolean
}

/** The GPU, and what it can do at most as measured in the same run. */
export interface Machine {
  readonly gpu: string
  readonly multiprocessors: number
  readonly memoryBytes: number
  readonly computeCapability: string
  readonly cudaDriver: string
  readonly cudaRuntime: string
  readonly laprox: string
  readonly copyBytesPerSecond: number
  readonly readBytesPerSecond: number
  readonly matrixOperationsPerSecond?: number
  readonly torch?: string
  /** A product of two matrices of 8192 by 8192 in PyTorch. */
  readonly torchMatrixOperationsPerSecond?: number
}

/** One stage of one configuration. Times are those of all layers, scaled where fewer were measured. */
export interface Result {
  readonly model: string
  readonly layers: number
  readonly measuredLayers: number
  readonly n: number
  readonly keep?: number
  readonly input?: 'peaked' | 'diffuse'
  readonly stage: string
  readonly variant?: string
  /** Kernels that laprox was told to use; absent: those of the chip. */
  readonly kernels?: string
  readonly peer?: Peer
  readonly medianUs: number
  readonly p10Us: number
  readonly p90Us: number
  readonly runs: number
  /** What the calls took the thread that made them. */
  readonly hostUs?: number
  /** The same work as a replay of a CUDA graph. */
  readonly graphUs?: number
  readonly bytes?: number
  readonly operations?: number
  /** The sum over the stage's phases of the longer of their two floors: bytes at the rate of a read or of a copy, operations at that of the tensor cores. */
  readonly floorUs?: number
  /** floorUs / medianUs */
  readonly share?: number
  readonly entries?: number
  readonly candidates?: number
  readonly exactScores?: number
  readonly path?: 'pruned' | 'full'
  readonly fallback?: string
  readonly workspaceBytes?: number
  readonly workspaceLimit?: number
}

/** Whether an eviction's answers are right, and how its input looks. */
export interface Check {
  readonly model: string
  readonly n: number
  readonly input: 'peaked' | 'diffuse'
  readonly stage: string
  readonly kernels?: string
  readonly entries: number
  readonly kept: number
  readonly candidates: number
  readonly exactScores: number
  readonly path: 'pruned' | 'full'
  /** Tokens and offsets that differ from the selection by all scores. */
  readonly tokensDiffer: number
  /** Parts of 16 bytes of kept rows that the compacted cache lacks. */
  readonly partsNotMoved: number
  /** Scores above their bound from exact norms. */
  readonly scoresBeyondBounds: number
  /** Share of entries whose bound from exact norms reaches the threshold. */
  readonly aboveThreshold: number
}

export interface Profile {
  readonly model: string
  readonly n: number
  readonly input: string
  readonly stage: string
  readonly kernels: readonly { readonly kernel: string; readonly us: number }[]
}

/** A stage that could not be measured. */
export interface Failure {
  readonly model: string
  readonly n?: number
  readonly input?: string
  readonly stage: string
  readonly error: string
}

/** A run of the benchmark, as it stands in the JSON. */
export interface Results {
  readonly machine: Machine
  readonly commit: string
  /** ISO 8601. */
  readonly date: string
  /** Whether sizes were small, which makes the figures worthless. */
  readonly quick: boolean
  readonly results: readonly Result[]
  readonly checks: readonly Check[]
  readonly profiles: readonly Profile[]
  readonly failures: readonly Failure[]
  /** What a reader has to know. */
  readonly notes: readonly string[]
}

/** A line that the native program or a peer prints. */
export type Line = Readonly<Record<string, unknown>> & { readonly kind: string }

/** Puts the lines of all programs together. */
export function collect(lines: readonly Line[], { commit, quick }: { commit: string; quick: boolean }): Results {
  const of = <T>(kind: string) => lines.filter((line) => line.kind === kind).map(({ kind: _, ...rest }) => rest as T)
  const [machine] = of<Machine>('machine')
  if (machine === undefined) throw new Error('the native program did not say what the machine is')
  const [torch] = of<{ torch: string; matrixOperationsPerSecond: number }>('peer-machine')
  return {
    machine: torch === undefined ? machine : { ...machine, torch: torch.torch, torchMatrixOperationsPerSecond: torch.matrixOperationsPerSecond },
    commit,
    date: new Date().toISOString(),
    quick,
    results: [...of<Measured>('result').map((result) => finish(result, machine)), ...of<Result>('peer')],
    checks: of<Check>('check'),
    profiles: of<Profile>('profile'),
    failures: of<Failure>('error'),
    notes: of<{ text: string }>('note').map(({ text }) => text),
  }
}

/** As the native program prints it: times of the measured layers alone. */
export type Measured = Result & { readonly phases: readonly Phase[] }

/** A stage of the whole model, with its floor. */
export function finish({ phases, ...result }: Measured, machine: Machine): Result {
  const scale = result.layers / result.measuredLayers
  const sum = (of: (phase: Phase) => number) => scale * phases.reduce((total, phase) => total + of(phase), 0)
  const { copyBytesPerSecond, readBytesPerSecond, matrixOperationsPerSecond = Number.POSITIVE_INFINITY } = machine
  const floorUs = sum(({ bytes, operations, copy }) => {
    return 1e6 * Math.max(bytes / (copy ? copyBytesPerSecond : readBytesPerSecond), operations / matrixOperationsPerSecond)
  })
  const medianUs = scale * result.medianUs
  return {
    ...result,
    medianUs,
    p10Us: scale * result.p10Us,
    p90Us: scale * result.p90Us,
    bytes: sum(({ bytes }) => bytes),
    operations: sum(({ operations }) => operations),
    floorUs,
    share: floorUs / medianUs,
  }
}
