# For whoever installs the library: put it in lib/cmake/kvlane beside lib/libkvlane.* and include/kvlane.h. Then
#     find_package(kvlane REQUIRED)
#     target_link_libraries(program PRIVATE kvlane::kvlane)         # or kvlane::static
get_filename_component(_kvlane_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
find_library(KVLANE_SHARED_LIBRARY kvlane PATHS "${_kvlane_prefix}/lib" NO_DEFAULT_PATH)
find_file(KVLANE_STATIC_LIBRARY libkvlane.a PATHS "${_kvlane_prefix}/lib" NO_DEFAULT_PATH)

foreach(_kvlane_kind kvlane static)
    if(_kvlane_kind STREQUAL "static")
        set(_kvlane_file "${KVLANE_STATIC_LIBRARY}")
    else()
        set(_kvlane_file "${KVLANE_SHARED_LIBRARY}")
    endif()
    if(_kvlane_file AND NOT TARGET kvlane::${_kvlane_kind})
        add_library(kvlane::${_kvlane_kind} UNKNOWN IMPORTED)
        set_target_properties(kvlane::${_kvlane_kind} PROPERTIES
            IMPORTED_LOCATION "${_kvlane_file}"
            INTERFACE_INCLUDE_DIRECTORIES "${_kvlane_prefix}/include")
    endif()
endforeach()
if(TARGET kvlane::static AND UNIX)
    find_package(Threads REQUIRED)
    set_property(TARGET kvlane::static PROPERTY INTERFACE_LINK_LIBRARIES Threads::Threads ${CMAKE_DL_LIBS} m)
endif()

if(NOT TARGET kvlane::kvlane AND NOT TARGET kvlane::static)
    set(kvlane_FOUND FALSE)
    set(kvlane_NOT_FOUND_MESSAGE "neither libkvlane.so nor libkvlane.a is in ${_kvlane_prefix}/lib")
endif()
unset(_kvlane_prefix)
unset(_kvlane_file)
