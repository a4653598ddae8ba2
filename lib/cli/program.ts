import { Command, CommanderError } from 'commander'
import { LaproxError, type LaproxErrorCode } from '../errors.js'
import { benchCommand } from './bench.js'
import { compareCommand } from './compare.js'
import { evalCommand } from './eval.js'
import { evictCommand } from './evict.js'
import { infoCommand } from './info.js'
import { packageVersion } from './package.js'
import type { Terminal } from './terminal.js'

/** What the user can put right by another command line. */
const usageCodes: readonly LaproxErrorCode[] = ['INVALID_ARGUMENT', 'BUDGET_TOO_SMALL']

const exitCodes = `
Exit codes:
  0    done
  1    failed: a file, a device or memory
  2    the command line asks for something that cannot be
  130  stopped by Ctrl-C (143: by SIGTERM); files are whole or not there`

const examples = `
Examples:
  laprox info
  laprox evict prompt.safetensors --keep 5% --out kept.safetensors --report report.html
  laprox compare prompt.safetensors --policy laprox,snapkv,adakv --keep 5%,10%`

/**
 * Runs the command line.
 *
 * @param args without the program's name
 * @returns the exit code
 */
export async function run(args: readonly string[], terminal: Terminal): Promise<number> {
  try {
    await program(terminal).parseAsync(args, { from: 'user' })
    return terminal.signal.aborted ? terminal.signal.reason : 0
  } catch (error) {
    if (error instanceof CommanderError) return error.exitCode === 0 ? 0 : 2
    if (terminal.signal.aborted) return terminal.signal.reason
    if (!(error instanceof LaproxError)) throw error
    terminal.stderr.write(`error: ${error.message} (${error.code})\n`)
    return usageCodes.includes(error.code) ? 2 : 1
  }
}

function program(terminal: Terminal): Command {
  const program = new Command('laprox')
    .description("Evicts language models' KV caches by what each entry contributes to the model's output.")
    .version(packageVersion)
    .showHelpAfterError('(--help says what there is)')
    .configureOutput({ writeOut: (text) => terminal.stdout.write(text), writeErr: (text) => terminal.stderr.write(text) })
    .exitOverride()
    .addHelpText('after', examples)
    .addHelpText('afterAll', exitCodes)
  for (const command of [infoCommand(terminal), evictCommand(terminal), compareCommand(terminal), benchCommand(terminal), evalCommand(terminal)]) {
    program.addCommand(command.copyInheritedSettings(program))
  }
  return program
}
