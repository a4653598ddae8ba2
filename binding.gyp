# The build without CMake. Same sources, flags and output name as CMakeLists.txt.
{
  "includes": ["native/sources.gypi"],
  "variables": {
    "laprox_werror%": 0,
    "laprox_cuda_only%": "",
    "laprox_nvcc%": "<!(node native/nvcc.mjs)",
    "laprox_version": "<!(node -p \"require('./package.json').version\")"
  },
  "target_defaults": {
    "default_configuration": "Release",
    "include_dirs": ["native", "native/include"],
    "defines": ["LAPROX_VERSION=\"<(laprox_version)\""],
    "cflags_cc!": ["-fno-rtti", "-fno-exceptions", "-std=gnu++17", "-std=gnu++20"],
    "cflags_cc": ["-std=c++20", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "<@(laprox_warnings)"],
    "configurations": { "Release": { "defines": ["NDEBUG"], "cflags": ["-O3"] } },
    "xcode_settings": {
      "CLANG_CXX_LANGUAGE_STANDARD": "c++20",
      "GCC_ENABLE_CPP_EXCEPTIONS": "YES",
      "GCC_SYMBOLS_PRIVATE_EXTERN": "YES"
    },
    "conditions": [["laprox_werror==1", { "cflags_cc": ["-Werror"] }]]
  },
  "targets": [
    {
      "target_name": "laprox_core",
      "type": "static_library",
      "sources": ["<@(laprox_core)"],
      "cflags_cc": ["<@(laprox_flags_core)"]
    },
    {
      "target_name": "laprox_cpu",
      "type": "static_library",
      "sources": ["<@(laprox_cpu)"],
      "cflags_cc": ["<@(laprox_flags_cpu)"]
    },
    {
      "target_name": "laprox",
      "dependencies": [
        "<!(node -p \"require('node-addon-api').targets\"):node_addon_api_except",
        "laprox_core",
        "laprox_cpu"
      ],
      "sources": ["<@(laprox_addon)"],
      "defines": ["NAPI_VERSION=9"],
      "cflags_cc": ["<@(laprox_flags_core)"],
      "conditions": [
        ["OS=='linux'", {
          "ldflags": [
            "-Wl,--version-script=<(module_root_dir)/cmake/addon.map",
            "-Wl,-z,now",
            "-Wl,--gc-sections",
            "-static-libstdc++"
          ],
          "libraries": ["-pthread", "-ldl"]
        }],
        ["target_arch=='x64'", { "dependencies": ["laprox_cpu_avx2", "laprox_cpu_avx512", "laprox_cpu_avx512bf16", "laprox_cpu_amx"] }]
      ]
    }
  ],
  "conditions": [
    ["laprox_nvcc!=''", {
      "targets": [
        {
          "target_name": "laprox_cuda",
          "type": "loadable_module",
          "product_prefix": "lib",
          "target_conditions": [["_type=='loadable_module'", { "product_extension": "so" }]], # after node-gyp's own, which says `node`
          "sources": ["<@(laprox_cuda)", "<@(laprox_cuda_core)"],
          "cflags_cc": ["<@(laprox_flags_core)"],
          "variables": {
            "conditions": [
              ["laprox_cuda_only==''", { "chosen": ["<@(laprox_cuda_architectures)"] }, { "chosen": ["<(laprox_cuda_only)"] }]
            ]
          },
          "rules": [
            {
              "rule_name": "nvcc",
              "extension": "cu",
              "process_outputs_as_sources": 1,
              "outputs": ["<(INTERMEDIATE_DIR)/<(RULE_INPUT_ROOT).cuda.o"],
              "action": [
                "<(laprox_nvcc)", "<@(laprox_flags_cuda)", "<@(chosen)", "-DNDEBUG", "-DLAPROX_VERSION=\"<(laprox_version)\"",
                "-Inative", "-Inative/include", "-c", "<(RULE_INPUT_PATH)", "-o", "<(INTERMEDIATE_DIR)/<(RULE_INPUT_ROOT).cuda.o"
              ]
            }
          ],
          "ldflags": ["-Wl,--version-script=<(module_root_dir)/cmake/cuda.map", "-Wl,--gc-sections", "-static-libstdc++"],
          "libraries": [
            "-L<!(node native/nvcc.mjs --libraries)",
            "-lcudart_static", "-pthread", "-ldl", "-lrt"
          ]
        }
      ]
    }],
    ["target_arch=='x64'", {
      "targets": [
        {
          "target_name": "laprox_cpu_avx2",
          "type": "static_library",
          "sources": ["<@(laprox_cpu_avx2)"],
          "cflags_cc": ["<@(laprox_flags_cpu)", "<@(laprox_flags_avx2)"]
        },
        {
          "target_name": "laprox_cpu_avx512",
          "type": "static_library",
          "sources": ["<@(laprox_cpu_avx512)"],
          "cflags_cc": ["<@(laprox_flags_cpu)", "<@(laprox_flags_avx512)"]
        },
        {
          "target_name": "laprox_cpu_avx512bf16",
          "type": "static_library",
          "sources": ["<@(laprox_cpu_avx512bf16)"],
          "cflags_cc": ["<@(laprox_flags_cpu)", "<@(laprox_flags_avx512)", "<@(laprox_flags_avx512bf16)"]
        },
        {
          "target_name": "laprox_cpu_amx",
          "type": "static_library",
          "sources": ["<@(laprox_cpu_amx)"],
          "cflags_cc": ["<@(laprox_flags_cpu)", "<@(laprox_flags_avx512)", "<@(laprox_flags_amx)"]
        }
      ]
    }]
  ]
}
