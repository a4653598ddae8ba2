// Writes ONNX models: as much of the format (onnx.proto, protocol buffers) as the graphs of these benchmarks need.

type ElementType = keyof typeof types
/** A size, or the name of one that differs from run to run. */
type Dim = number | string
type Attributes = Readonly<Record<string, number | readonly number[]>>

/** The numbers of TensorProto.DataType. */
const types = { float32: 1, int64: 7, float16: 10 } as const
const IR_VERSION = 8
const OPSET = 17

/** A graph under construction. Values go by name; numbers below are those of the fields in onnx.proto. */
export class Graph {
  readonly #fields: Uint8Array[] = [text(2, 'graph')]
  #values = 0

  /** A tensor that is fed. */
  input(name: string, dims: readonly Dim[], type: ElementType = 'float32'): string {
    this.#fields.push(message(11, encodeValue(name, dims, type)))
    return name
  }

  /** A tensor that comes out: another name for a value. */
  output(name: string, dims: readonly Dim[], value: string, type: ElementType = 'float32'): void {
    this.#node('Identity', [value], [name], {})
    this.#fields.push(message(12, encodeValue(name, dims, type)))
  }

  /** A float32 tensor that is part of the model. */
  weights(dims: readonly number[], data: Float32Array): string {
    return this.#constant(types.float32, dims, data)
  }

  /** A float32 number. */
  scalar(value: number): string {
    return this.#constant(types.float32, [], Float32Array.of(value))
  }

  /** int64 [n]: a shape, axes, indices. */
  indices(...values: readonly number[]): string {
    return this.#constant(types.int64, [values.length], BigInt64Array.from(values, BigInt))
  }

  /** The value that an operator gives. */
  add(operator: string, inputs: readonly string[], attributes: Attributes = {}): string {
    const output = this.#name()
    this.#node(operator, inputs, [output], attributes)
    return output
  }

  /** The parts of a value along an axis, one index each. */
  split(value: string, axis: number, parts: number): string[] {
    const outputs = Array.from({ length: parts }, () => this.#name())
    this.#node('Split', [value, this.indices(...outputs.map(() => 1))], outputs, { axis })
    return outputs
  }

  /** The bytes of a model. */
  encode(): Uint8Array {
    return Buffer.concat([integer(1, IR_VERSION), message(7, this.#fields), message(8, [text(1, ''), integer(2, OPSET)])])
  }

  #name(): string {
    return `value.${this.#values++}`
  }

  #node(operator: string, inputs: readonly string[], outputs: readonly string[], attributes: Attributes): void {
    const fields = [...inputs.map((name) => text(1, name)), ...outputs.map((name) => text(2, name)), text(4, operator)]
    for (const [name, value] of Object.entries(attributes)) fields.push(message(5, encodeAttribute(name, value)))
    this.#fields.push(message(1, fields))
  }

  #constant(type: number, dims: readonly number[], data: Float32Array | BigInt64Array): string {
    const name = this.#name()
    const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength)
    this.#fields.push(message(5, [...dims.map((dim) => integer(1, dim)), integer(2, type), text(8, name), field(9, bytes)]))
    return name
  }
}

/** One integer, or a list. */
function encodeAttribute(name: string, value: number | readonly number[]): Uint8Array[] {
  return typeof value === 'number'
    ? [text(1, name), integer(3, value), integer(20, 2)]
    : [text(1, name), ...value.map((item) => integer(8, item)), integer(20, 7)]
}

function encodeValue(name: string, dims: readonly Dim[], type: ElementType): Uint8Array[] {
  const shape = dims.map((dim) => message(1, [typeof dim === 'number' ? integer(1, dim) : text(2, dim)]))
  return [text(1, name), message(2, [message(1, [integer(1, types[type]), message(2, shape)])])]
}

function message(number: number, fields: readonly Uint8Array[]): Uint8Array {
  return field(number, Buffer.concat(fields))
}

function text(number: number, value: string): Uint8Array {
  return field(number, Buffer.from(value))
}

/** A field of bytes with their length before them. */
function field(number: number, bytes: Uint8Array): Uint8Array {
  return Buffer.concat([varint((number << 3) | 2), varint(bytes.length), bytes])
}

function integer(number: number, value: number): Uint8Array {
  return Buffer.concat([varint(number << 3), varint(value)])
}

/** Seven bits a byte, the lowest first; negative numbers as 64 bits. */
function varint(value: number): Uint8Array {
  const bytes: number[] = []
  let rest = BigInt.asUintN(64, BigInt(value))
  for (; rest > 127n; rest >>= 7n) bytes.push(Number(rest & 127n) | 128)
  return Uint8Array.from([...bytes, Number(rest)])
}
