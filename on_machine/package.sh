# shellcheck shell=bash
# shellcheck disable=SC2034  # what is set here is used by the scripts that source it
# What is installed of this program on a cloud machine, and at which versions; sourced by the scripts that install.
# A checkout is installed as it is. A project of `finetune init` has no pyproject.toml of ours, but a wheel in this folder.
#
#   PINNED      the file of pinned versions
#   DEFINITION  the file that stands for the program in the key of the installed packages
#   request     sets REQUEST to the arguments of `uv pip install` for the program, such as: request train,serve
wheels=(on_machine/finetune_text2sql-*.whl)
if [ "${#wheels[@]}" -gt 1 ]; then
  echo "set-up: several wheels in on_machine/ (${wheels[*]##*/}); remove all but the newest, then launch again" >&2
  exit 2
elif [ -f "${wheels[0]}" ]; then
  readonly PINNED=on_machine/constraints.txt DEFINITION="${wheels[0]}"
  request() {  # --reinstall-package: an upgraded wheel may have the same version
    REQUEST=(--reinstall-package finetune-text2sql "$DEFINITION${1:+[$1]}")
  }
else
  readonly PINNED=constraints.txt DEFINITION=pyproject.toml
  request() { REQUEST=(--editable ".${1:+[$1]}"); }
fi
unset wheels
for file in "$PINNED" "$DEFINITION"; do
  if [ ! -f "$file" ]; then
    echo "set-up: $file is missing on the machine: neither a checkout nor a project of \`finetune init\`; launch from one of them" >&2
    exit 2
  fi
done
